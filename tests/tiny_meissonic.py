"""A stand-in for Meissonic, which is on no package registry: pipelines and a transformer with its call conventions.

The guidance halves lie one after the other in every argument but `img_ids`, `txt_ids` and `timestep`.
"""

import contextlib

import torch
from torch import nn

MASK, CODES, SIDE = 12, 8, 4


class _Mlm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv2 = nn.Conv2d(width, CODES, 1, bias=False)
        nn.init.normal_(self.conv2.weight, std=0.7)

    def forward(self, x):
        return self.conv2(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Transformer2DModel(nn.Module):
    """Logits (B, V, H, W) of tokens (B, H, W), in which each position sees the mean of all."""

    def __init__(self, width=16):
        super().__init__()
        self.tokens = nn.Embedding(MASK + 1, width)
        self.text, self.pooled, self.micro = nn.Linear(6, width), nn.Linear(5, width), nn.Linear(5, width)
        self.places, self.time = nn.Linear(3, width), nn.Linear(1, width)
        self.mlm_layer = _Mlm(width)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        micro_conds=None,
        joint_attention_kwargs=None,
        return_dict=True,
    ):
        _, height, width = hidden_states.shape
        assert img_ids.shape == (height * width, 3) and txt_ids.shape == (encoder_hidden_states.shape[1], 3)
        assert timestep.shape == (1,)
        x = (
            self.tokens(hidden_states.flatten(1))
            + self.places(img_ids.float())
            + self.time(timestep[:, None].float() / 9)
        )
        x = x + x.mean(1, keepdim=True)
        text = self.text(encoder_hidden_states).mean(1) + self.pooled(pooled_projections) + self.micro(micro_conds)
        if joint_attention_kwargs is not None:
            text = text + joint_attention_kwargs["ip"][0].mean(1)
        x = torch.tanh(x + text[:, None])
        output = self.mlm_layer(x.mT.unflatten(2, (height, width)))
        return output if return_dict else (output,)


class Pipeline:
    """Text to image."""

    def __init__(self, scheduler):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer = Transformer2DModel().eval()
        self.scheduler = scheduler

    @contextlib.contextmanager
    def progress_bar(self, iterable=None, total=None):
        yield self

    def begin(self, batch_size):
        """The tokens, the first step, and the share of masked ones."""
        return torch.full((batch_size, SIDE, SIDE), MASK), 0, 1.0

    @torch.no_grad()
    def __call__(self, prompts, num_inference_steps=10, guidance_scale=9.0, generator=None, ip=None, callback=None):
        """Tokens for prompts, floats (B, L, 6); generators as for the scheduler."""
        size, guided = len(prompts), guidance_scale > 1
        self.scheduler.set_timesteps(num_inference_steps, (2, 0))
        tokens, start, share = self.begin(size)
        text = torch.cat([torch.zeros_like(prompts), prompts]) if guided else prompts
        micro_conds = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.6]]).expand(len(text), -1)
        ids = torch.arange(SIDE)
        img_ids = torch.stack([0 * ids[:, None] + 0 * ids, ids[:, None] + 0 * ids, 0 * ids[:, None] + ids], -1).flatten(
            0, 1
        )
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps) - start):
            for i in range(start, len(timesteps)):
                model_output = self.transformer(
                    hidden_states=torch.cat([tokens] * 2) if guided else tokens,
                    micro_conds=micro_conds,
                    pooled_projections=text.mean(1)[:, :5],
                    encoder_hidden_states=text,
                    img_ids=img_ids,
                    txt_ids=torch.zeros(text.shape[1], 3),
                    timestep=torch.tensor([timesteps[i]]),
                    joint_attention_kwargs=None if ip is None else {"ip": [torch.cat([ip] * 2) if guided else ip]},
                )
                if guided:
                    uncond_logits, cond_logits = model_output.chunk(2)
                    model_output = uncond_logits + guidance_scale * (cond_logits - uncond_logits)
                tokens = self.scheduler.step(
                    model_output=model_output, timestep=timesteps[i], sample=tokens, generator=generator,
                    starting_mask_ratio=share,
                ).prev_sample  # fmt: skip
                if callback is not None:
                    callback(i, timesteps[i], tokens)
        return tokens


KNOWN = torch.arange(SIDE**2).view(SIDE, SIDE) % CODES


class Img2ImgPipeline(Pipeline):
    """From the middle of the schedule on, from known tokens with noise."""

    def begin(self, batch_size):
        start = len(self.scheduler.timesteps) // 2
        noise = self.scheduler.timesteps[start - 1]
        return (
            self.scheduler.add_noise(KNOWN.repeat(batch_size, 1, 1), noise, torch.Generator().manual_seed(0)),
            start,
            1.0,
        )


class InpaintPipeline(Pipeline):
    """From the third step on, which nobody tells the scheduler, half of the tokens known."""

    def begin(self, batch_size):
        tokens = KNOWN.repeat(batch_size, 1, 1)
        tokens[:, 2:] = MASK
        return tokens, 2, 0.5


Pipeline.__module__ = "src.pipeline"
Img2ImgPipeline.__module__ = "src.pipeline_img2img"
InpaintPipeline.__module__ = "src.pipeline_inpaint"
