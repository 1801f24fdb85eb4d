def version() -> str: ...
def resolve_isa(requested: int) -> tuple[int, int]: ...
def sample_tokens(
    isa: int,
    num_threads: int,
    parallel: int,
    shape: tuple[int, ...],
    dtype: int,
    cond: tuple[int, ...],
    uncond: tuple[int, ...],
    tokens: int,
    seeds: int,
    mask_token_id: int,
    step: int,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
    token_ids: int,
    token_ids_length: int,
    logprob: int,
    logprob_length: int,
) -> tuple[int, int]: ...
def differential_sample(
    isa: int,
    num_threads: int,
    parallel: int,
    shape: tuple[int, ...],
    dtype: int,
    cond: tuple[int, ...],
    uncond: tuple[int, ...],
    tokens: int,
    seeds: int,
    mask_token_id: int,
    step: int,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
    variant: int,
    aliased_history: bool,
    has_history: bool,
    share: float,
    history: tuple[int, int],
    written: tuple[int, int],
    token_ids: tuple[int, int],
    logprob: tuple[int, int],
    divergence: tuple[int, int],
    workspace: tuple[int, int],
) -> tuple[int, int]: ...
def differential_sample_workspace(
    num_threads: int, shape: tuple[int, ...], cond: tuple[int, ...], uncond: tuple[int, ...]
) -> int: ...
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
def int4_linear_workspace(
    a8: bool, isa: int, num_threads: int, shape: tuple[int, ...], dtype: int, x_stride: int, group_size: int
) -> int: ...
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
    workspace: tuple[int, int],
) -> tuple[int, int]: ...
def peak(isa: str, dtype: str, num_threads: int, seconds: float) -> float: ...
