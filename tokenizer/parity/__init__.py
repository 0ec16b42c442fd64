"""Parity: does this project compute what a recording of the reference says?

A recording is a folder with a `README.json` (configurations, conventions, a note for each file, checksums) and
safetensors files of weights, inputs and outputs (FORMAT 16). Nothing about sizes is taken for granted: configurations
and notes are read from `README.json`, and what a tensor is follows from its name.

    python -m tokenizer.parity FOLDER [--device cuda] [--dtype bfloat16] [--only PATTERN] [--json]

Read in this order: `recording` (the folder), `bench` (networks built from it), `compare` (tolerances), `runner` (which
joins them), and one file for each kind of recorded tensor: `visuals`, `weights`, `units`, `pixels`, `splats`,
`multiview`.
"""
