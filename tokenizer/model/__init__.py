"""The AToken network in plain torch: no engine, no YAML, no files.

Read in this order: `config` (sizes), `plan` (what a batch needs once), `attention`, `rope`, `positions`, `transformer`,
`encoder`, `decoder`, `posterior`, and `atoken`, which joins them.
"""
