"""The PLM itself: loading it, proving that its LM head says what it computes, exporting what is shared."""
