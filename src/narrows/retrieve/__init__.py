"""Finding what matters: documents, passages, and their scores against a question."""
