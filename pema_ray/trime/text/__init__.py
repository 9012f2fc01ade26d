"""Text as a stream of tokens: corpora, vocabularies, segments, batches that share a memory, evaluation windows."""
