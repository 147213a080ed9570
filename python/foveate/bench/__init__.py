"""The benchmark suite: correctness first, then interleaved times against peers and ceilings."""
