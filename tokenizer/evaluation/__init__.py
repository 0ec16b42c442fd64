"""How good reconstructions are, measured on pictures never trained on."""
