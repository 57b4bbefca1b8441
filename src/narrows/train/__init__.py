"""Training of the parts that need it: small modules beside models that stay as they are."""
