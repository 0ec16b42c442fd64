"""Networks that measure: frozen classifiers whose features losses and evaluation compare. Models never use them."""
