"""Parts of `benchmarks.training`: batches that are made up, engines that step on them, and how steps are measured."""
