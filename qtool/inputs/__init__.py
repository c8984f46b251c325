"""What is scored: items of text and pictures, panels of queries with documents, pixels ready for the model."""
