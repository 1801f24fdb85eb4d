"""Microbenchmarks: `python -m benchmarks` times every case against its peers in interleaved rounds."""
