"""Pre-training and fine-tuning: sequences, masks, objectives, the two loops."""
