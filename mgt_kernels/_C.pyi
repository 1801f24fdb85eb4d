def version() -> str: ...
def resolve_isa(requested: int) -> tuple[int, int]: ...
def sample_tokens(isa: int, num_threads: int, parallel: int, args: bytes, outputs: bytes) -> tuple[int, int]: ...
def differential_sample(
    isa: int,
    num_threads: int,
    parallel: int,
    sample: bytes,
    args: bytes,
    history: int,
    written: int,
    token_ids: int,
    logprob: int,
    divergence: int,
) -> tuple[int, int]: ...
def mask_by_confidence(
    isa: int,
    num_threads: int,
    parallel: int,
    num_samples: int,
    num_positions: int,
    token_ids: int,
    logprob: int,
    mask_len: int,
    seeds: int,
    mask_token_id: int,
    step: int,
    temperature: float,
    tokens: int,
    tokens_length: int,
) -> tuple[int, int]: ...
def commit_tokens(isa: int, num_threads: int, parallel: int, args: bytes, outputs: bytes) -> tuple[int, int]: ...
def philox(
    isa: int,
    seed: int,
    position: int,
    step: int,
    stream: int,
    first_block: int,
    num_blocks: int,
    words: int,
    words_length: int,
) -> int: ...
def gaussian(isa: int, seed: int, position: int, step: int, noise: int, noise_length: int) -> int: ...
def kernel_isa(op: str, isa: int) -> tuple[int, int]: ...
def int4_linear(
    a8: bool,
    isa: int,
    num_threads: int,
    parallel: int,
    shape: tuple[int, ...],
    dtype: int,
    x: int,
    x_stride: int,
    weight: tuple[int, ...],
    bias: int,
    x_scale: tuple[int, int],
    y: tuple[int, int],
) -> tuple[int, int]: ...
def peak(isa: str, dtype: str, num_threads: int, seconds: float) -> float: ...
