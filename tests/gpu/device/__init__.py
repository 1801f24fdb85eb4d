"""What `bash tests/gpu/device.sh` runs on a GPU, in parts, each a file with `names()` and `work(name)`."""
