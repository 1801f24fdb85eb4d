"""Microbenchmarks: `mgt bench` times every op beside its peers in interleaved rounds."""
