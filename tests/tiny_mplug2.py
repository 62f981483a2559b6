"""mPLUG-2 as its authors publish it, tiny and random: the modules under their names, and the files.

Written from the public description of the layout, not from our runtime: fused attention, three-dimensional convolutions
of one pixel, masks that are added, beams without a cache. `state_dict` of the tree has the original's keys, also those
that its task never reads.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BertTokenizer

WIDTH, PATCH, SIDE, FRAMES, BLOCKS = 64, 14, 2, 4, 2  # heads of vision are width / 64
CLIP_WIDTH, CLIP_BLOCKS, CLIP_WORDS, CLIP_LENGTH, SHARED = 32, 1, 20, 7, 48  # of CLIP's text half
SIZES = {
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 40,
    "text_encoder_layers": 4,
    "fusion_layers": 2,
    "text_decode_layers": 3,
    "stride_layer": 1000,
    "num_uni_layer": 2,
}
START, END = 2, 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "video", "of", "what", "is", "it", "?", "man", "dog", "red"]


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class LocalTemporal(nn.Module):
    def __init__(self):
        super().__init__()
        half = WIDTH // 2
        self.ln = nn.LayerNorm(WIDTH)
        self.down_proj = nn.Conv3d(WIDTH, half, 1)
        self.conv = nn.Conv3d(half, half, (3, 1, 1), padding=(1, 0, 0), groups=half)
        self.up_proj = nn.Conv3d(half, WIDTH, 1)

    def forward(self, x):
        """x [clips, width, frames, side, side]."""
        normed = self.ln(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return self.up_proj(quick_gelu(self.conv(self.down_proj(normed))))


class TemporalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.lmhra1, self.lmhra2 = LocalTemporal(), LocalTemporal()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def _over_time(self, part, x, frames):
        """x [1 + places, clips · frames, width]; the class token stays as it is."""
        patches = x[1:]
        places, both, width = patches.shape
        side = int(places**0.5)
        grid = patches.view(side, side, both // frames, frames, width).permute(2, 4, 3, 0, 1)
        grid = grid + part(grid)
        flat = grid.permute(3, 4, 0, 2, 1).reshape(places, both, width)
        return torch.cat([x[:1], flat])

    def forward(self, x, frames):
        x = self._over_time(self.lmhra1, x, frames)
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        x = self._over_time(self.lmhra2, x, frames)
        return x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))


class VideoFormer(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(SIDE**2 + 1, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, SHARED))
        self.conv1 = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH), bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(TemporalBlock() for _ in range(BLOCKS))})

    def forward(self, pixels):
        clips = pixels.shape[0]
        patches = self.conv1(pixels)
        frames = patches.shape[2]
        x = patches.permute(0, 2, 3, 4, 1).reshape(clips * frames, -1, WIDTH)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x).permute(1, 0, 2)
        for block in self.transformer["resblocks"]:
            x = block(x, frames)
        x = x.view(-1, clips, frames, WIDTH).permute(1, 2, 0, 3)
        return self.ln_post(torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1))


class ClipBlock(nn.Module):
    """Of CLIP's text half, which nothing runs."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(CLIP_WIDTH, 1)
        self.ln_1, self.ln_2 = nn.LayerNorm(CLIP_WIDTH), nn.LayerNorm(CLIP_WIDTH)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(CLIP_WIDTH, 4 * CLIP_WIDTH),
                "c_proj": nn.Linear(4 * CLIP_WIDTH, CLIP_WIDTH),
            }
        )


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = VideoFormer()
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ClipBlock() for _ in range(CLIP_BLOCKS))})
        self.token_embedding = nn.Embedding(CLIP_WORDS, CLIP_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CLIP_LENGTH, CLIP_WIDTH))
        self.ln_final = nn.LayerNorm(CLIP_WIDTH)
        self.text_projection = nn.Parameter(torch.randn(CLIP_WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.ones([]))


def normed(width):
    return nn.LayerNorm(width, eps=1e-12)


class Heads(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.heads = s["num_attention_heads"]
        self.query, self.key, self.value = (nn.Linear(s["hidden_size"], s["hidden_size"]) for _ in range(3))

    def forward(self, x, others, mask):
        def split(states):
            return states.reshape(*states.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = split(self.query(x)), split(self.key(others)), split(self.value(others))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2)


class Dense(nn.Module):
    """`dense`, with a norm of the sum where there is one."""

    def __init__(self, inputs, outputs, *, norm):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        if norm:
            self.LayerNorm = normed(outputs)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.self = Heads(s)
        self.output = Dense(s["hidden_size"], s["hidden_size"], norm=True)

    def forward(self, x, others=None, mask=None):
        mixed = self.self(x, x if others is None else others, mask)
        return self.output.LayerNorm(self.output.dense(mixed) + x)


class Layer(nn.Module):
    def __init__(self, s, *, cross, latents=False, vision=False):
        super().__init__()
        width, inner = s["hidden_size"], s["intermediate_size"]
        self.attention = Attention(s)
        if cross:
            self.crossattention = Attention(s)
        if latents:
            self.latents = nn.Parameter(torch.randn(50, width))
        self.intermediate, self.output = Dense(width, inner, norm=False), Dense(inner, width, norm=True)
        if vision:
            self.intermediate_vision, self.output_vision = (
                Dense(width, inner, norm=False),
                Dense(inner, width, norm=True),
            )

    def forward(self, x, mask=None, others=None, others_mask=None):
        x = self.attention(x, mask=mask)
        if others is not None:
            x = self.crossattention(x, others, others_mask)
        return self.output.LayerNorm(self.output.dense(functional.gelu(self.intermediate.dense(x))) + x)


class Embeddings(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.word_embeddings = nn.Embedding(s["vocab_size"], s["hidden_size"])
        self.position_embeddings = nn.Embedding(s["max_position_embeddings"], s["hidden_size"])
        self.token_type_embeddings = nn.Embedding(s["type_vocab_size"], s["hidden_size"])
        self.LayerNorm = normed(s["hidden_size"])
        self.register_buffer("position_ids", torch.arange(s["max_position_embeddings"])[None])

    def forward(self, tokens):
        places = self.position_embeddings(self.position_ids[:, : tokens.shape[1]])
        kinds = self.token_type_embeddings(torch.zeros_like(tokens))
        return self.LayerNorm(self.word_embeddings(tokens) + places + kinds)


class Bert(nn.Module):
    """Text encoder, fusion encoder or the decoder's body."""

    def __init__(self, s, layers, *, cross, universal):
        super().__init__()
        self.embeddings = Embeddings(s)
        last = layers - s["num_uni_layer"]
        made = [
            Layer(
                s,
                cross=cross or (universal and i >= last),
                latents=universal and i == last,
                vision=universal and i >= last,
            )
            for i in range(layers)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(made)})


class Predictions(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.transform = Dense(s["hidden_size"], s["hidden_size"], norm=True)
        self.decoder = nn.Linear(s["hidden_size"], s["vocab_size"])
        self.bias = self.decoder.bias


class Decoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.bert = Bert(s, s["text_decode_layers"], cross=True, universal=True)
        self.cls = nn.ModuleDict({"predictions": Predictions(s)})
        self.cls["predictions"].decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, tokens, memory, memory_mask):
        length = tokens.shape[1]
        causal = torch.full((length, length), -10000.0).triu(1)[None, None]
        states = self.bert.embeddings(tokens)
        for layer in self.bert.encoder["layer"]:
            states = layer(states, causal, memory, (1 - memory_mask[:, None, None].float()) * -10000.0)
        head = self.cls["predictions"]
        return head.decoder(head.transform.LayerNorm(functional.gelu(head.transform.dense(states))))


class MPlug2(nn.Module):
    """All of it; `twins` are the slow copies in files for questions."""

    def __init__(self, sizes: dict[str, Any] = SIZES, *, twins: bool = False):
        super().__init__()
        self.s = sizes
        for suffix in ("", *(["_m"] if twins else [])):
            self.add_module(f"visual_encoder{suffix}", Clip())
            self.add_module(
                f"text_encoder{suffix}", Bert(sizes, sizes["text_encoder_layers"], cross=False, universal=True)
            )
            self.add_module(
                f"fusion_encoder{suffix}", Bert(sizes, sizes["num_hidden_layers"], cross=True, universal=False)
            )
            self.add_module(f"text_decoder{suffix}", Decoder(sizes))
            self.add_module(f"visn_emb_norm{suffix}", normed(sizes["hidden_size"]))
            if sizes["hidden_size"] != WIDTH:
                self.add_module(f"visn_fc{suffix}", nn.Linear(WIDTH, sizes["hidden_size"]))
                self.add_module(f"visn_layer_norm{suffix}", normed(sizes["hidden_size"]))

    def see(self, pixels):
        vision = self.visual_encoder.visual(pixels)
        if self.s["hidden_size"] != WIDTH:
            vision = self.visn_layer_norm(self.visn_fc(vision))
        first, second = self.text_encoder.encoder["layer"][-2:]
        gathered = first(first.latents.expand(len(vision), -1, -1), others=vision)
        return self.visn_emb_norm(vision + second(vision, others=gathered))

    def memory(self, pixels, question=None, question_mask=None):
        seen = self.see(pixels)
        mask = torch.ones(seen.shape[:2])
        if question is None:
            return seen, mask
        added = (1 - question_mask[:, None, None].float()) * -10000.0
        states = self.text_encoder.embeddings(question)
        for layer in self.text_encoder.encoder["layer"]:
            states = layer(states, added)
        for layer in self.fusion_encoder.encoder["layer"][-self.s["fusion_layers"] :]:
            states = layer(states, added, seen)
        return torch.cat([seen, states], 1), torch.cat([mask, question_mask.float()], 1)

    def logits(self, pixels, tokens, question=None, question_mask=None):
        return self.text_decoder(tokens, *self.memory(pixels, question, question_mask))

    def search(self, pixels, beams, shortest, longest, question=None, question_mask=None):
        """The published loop for one clip: the whole beginning is run again for every token."""
        memory, mask = self.memory(pixels, question, question_mask)
        memory, mask = memory.expand(beams, -1, -1), mask.expand(beams, -1)
        sequences = torch.full((beams, 1), START)
        total = torch.tensor([0.0] + [float("-inf")] * (beams - 1))
        hypotheses = []
        for step in range(longest):
            words = self.text_decoder(sequences, memory, mask)[:, -1]
            log = torch.log(torch.softmax(words, -1))
            if step < shortest:
                log[:, END] = -1e20
            penalty = ((5.0 + (step + 1)) / 6.0) ** 0.6
            scores = ((log + total.unsqueeze(1)) / penalty).reshape(-1)
            best, index = scores.topk(beams)
            total = best * penalty
            origin, word = index // log.shape[1], index.fmod(log.shape[1])
            sequences = torch.cat([sequences.index_select(0, origin), word.unsqueeze(1)], -1)
            ended = word.eq(END)
            if step + 1 == longest or ended[0]:
                hypotheses += [(float(best[j]), sequences[j].tolist()) for j in range(beams)]
                break
            hypotheses += [(float(best[j]), sequences[j].tolist()) for j in range(beams) if ended[j]]
        return sorted(hypotheses, key=lambda one: one[0], reverse=True)


def random_weights(model: MPlug2, seed: int = 0) -> MPlug2:
    """Weights away from every value that would hide a mistake; twins differ from what they are twins of."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or ".ln" in name
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
            if not is_norm:
                drawn = torch.randn(parameter.shape, generator=generator) * (2.0 if "conv" in name else 0.3)
            parameter.copy_(drawn)
        model.visual_encoder.visual.conv1.weight.mul_(0.05)
    return model.eval()


def clip(seed: int = 0, clips: int = 1) -> torch.Tensor:
    """Random pixels `[clips, 3, FRAMES, image, image]`."""
    return torch.randn(clips, 3, FRAMES, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed))


def write_original(folder: Path, model: MPlug2, wrapper: str = "model", *, pretraining_names: bool = False) -> Path:
    """Write the file with what training leaves beside the weights, the authors' sizes and BERT's tokenizer."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    if pretraining_names:
        state = {
            name.replace("text_encoder.", "text_encoder.bert.").replace(
                "fusion_encoder.", "fusion_encoder.fusion.bert."
            )
            if "decode" not in name
            else name: tensor
            for name, tensor in state.items()
        }
    beside: dict[str, Any] = {"epoch": 3, "config": {"prompt": "a video of"}, "lr_scheduler": {"step": 1}}
    if wrapper == "model":
        beside["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(100)}}}
    else:  # DeepSpeed's
        beside = {"global_steps": 7, "ds_version": "0.8.0", "dp_world_size": 8}
    torch.save({wrapper: state, **beside}, folder / "mPLUG2_tiny.pth")
    (folder / "config_bert.json").write_text(json.dumps(model.s))
    words = WORDS + [f"w{index}" for index in range(model.s["vocab_size"] - len(WORDS))]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder / "bert")
    return folder
