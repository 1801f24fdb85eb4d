"""Token merging in the tiny transformer once more, in plain steps: sample by sample, one block after the other."""

import math

import torch

from mgt_kernels import match_tokens, merge_tokens, unmerge_tokens


def merged_by_hand(transformer, inputs, merging):
    """Logits with tokens merged as a `TokenMerging` says, outside of a generation."""
    height, width = inputs["hidden_states"].shape[1:]
    grid = height // 2, width // 2
    image, text, time, tables = transformer.begin(**inputs)
    samples = [
        _sample(transformer, merging, image[b : b + 1], text[b : b + 1], time[b : b + 1], tables, grid)
        for b in range(len(image))
    ]
    return transformer.end(torch.cat(samples), grid)


def _sample(transformer, merging, image, text, time, tables, grid):
    length = text.shape[1]
    match, num_blocks = None, 0

    def match_anew(x):
        nonlocal match, num_blocks
        if num_blocks % merging.every == 0:
            match = match_tokens(x, grid, ratio=merging.ratio, seed=merging.seed, step=0)
        num_blocks += 1

    def heads(x, attn):
        return x[0].unflatten(-1, (attn.heads, -1)).transpose(0, 1)

    def attend(attn, h, text_h=None):
        q, k, v = (heads(part(h), attn) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text_h is not None:
            text_q, text_k, text_v = (
                heads(part(text_h), attn) for part in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            q = torch.cat([attn.norm_added_q(text_q), q], dim=1)
            k = torch.cat([attn.norm_added_k(text_k), k], dim=1)
            v = torch.cat([text_v, v], dim=1)
        merged = [torch.cat([table[:length], merge_tokens(table[None, length:], match)[0]]) for table in tables]
        scores = _rotated(q, *merged) @ _rotated(k, *merged).transpose(1, 2) / math.sqrt(q.shape[-1])
        if merging.proportional:
            scores = scores + torch.cat([torch.zeros(length), match.sizes[0].double().log()])
        mixed = (scores.softmax(-1) @ v.double()).float().transpose(0, 1).flatten(1)[None]
        if text_h is None:
            return mixed
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])

    for block in transformer.transformer_blocks:
        match_anew(image)
        h, gate, shift, scale, mlp_gate = (_over_tokens(x) for x in block.norm1(image, emb=time))
        text_h, text_gate, text_shift, text_scale, text_mlp_gate = (
            _over_tokens(x) for x in block.norm1_context(text, emb=time)
        )
        attended, text_attended = attend(block.attn, merge_tokens(h, match), text_h)
        image = image + gate * unmerge_tokens(attended, match)
        h = block.norm2(image) * (1 + scale) + shift
        image = image + mlp_gate * unmerge_tokens(block.ff(merge_tokens(h, match)), match)
        text = text + text_gate * text_attended
        text_h = block.norm2_context(text) * (1 + text_scale) + text_shift
        text = text + text_mlp_gate * block.ff_context(text_h)

    both = torch.cat([text, image], dim=1)
    for block in transformer.single_transformer_blocks:
        if not merging.single_stream:
            both = block(both, time, tables)
            continue
        match_anew(both[:, length:])
        h, gate = block.norm(both, emb=time)
        h = torch.cat([h[:, :length], merge_tokens(h[:, length:], match)], dim=1)
        out = block.proj_out(torch.cat([attend(block.attn, h), block.act_mlp(block.proj_mlp(h))], dim=2))
        out = torch.cat([out[:, :length], unmerge_tokens(out[:, length:], match)], dim=1)
        both = both + gate[:, None] * out
    return both[:, length:]


def _over_tokens(x):
    """A modulation (1, C) as (1, 1, C)."""
    return x[:, None] if x.ndim == 2 else x


def _rotated(x, cos, sin):
    """(heads, L, D) by tables (L, D), neighbouring channels as complex numbers, in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos.double()[:, ::2], sin.double()[:, ::2])
    return torch.view_as_real(pairs * turn).flatten(-2)
