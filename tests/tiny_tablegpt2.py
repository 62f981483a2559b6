"""TableGPT2 as its authors publish it, tiny and random: the modules under their names, and the files.

Written from the public description of the layout, not from our runtime: padded grids, masks, queries that meet keys,
norms around residuals. One module tree per variant; its `state_dict` has the original's keys.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

from tests.tiny_models import PROSE, make_tiny_tokenizer

HIDDEN, CELL, QUERIES, HEADS, HEAD_DIM, SUMMARY_HEAD_DIM = 32, 16, 3, 2, 8, 8
ROWS, COLUMNS, CELL_TOKENS = 6, 5, 12  # the padded grid: what the original's swapped limits come to
PLACE = -114
SENTENCE = {
    "model_type": "bert",
    "vocab_size": 128,
    "hidden_size": CELL,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
DECODER = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 384,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MARKUP = {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2, "vocab_size": 128, "n_positions": 64}


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **more):
        return self.fn(x, **more) + x


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x, **more):
        return self.fn(self.norm(x), **more)


class Geglu(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * functional.gelu(gates)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8 * width), Geglu(), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x, **_):
        return self.net(x)


class RowColAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(CELL, 3 * HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, CELL)

    def forward(self, x, mask):
        """x [others, n, width], mask [n, n]: scores that it does not allow become -1e10."""
        others, length, _ = x.shape
        q, k, v = (
            part.reshape(others, length, HEADS, HEAD_DIM).permute(0, 2, 1, 3) for part in self.to_qkv(x).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2)) * HEAD_DIM**-0.5
        weights = scores.masked_fill(mask[None, None] == 0, -1e10).softmax(-1)
        return self.to_out((weights @ v).permute(0, 2, 1, 3).reshape(others, length, -1))


class Qformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(QUERIES, HIDDEN))
        self.to_kv = nn.Linear(CELL, 2 * HIDDEN, bias=False)
        self.ff = PreNorm(HIDDEN, Residual(FeedForward(HIDDEN)))

    def forward(self, cells, mask):
        """cells [rows, columns, width], mask [rows, columns] of real cells; out [columns, queries, hidden]."""
        rows, columns, _ = cells.shape
        k, v = self.to_kv(cells.transpose(0, 1)).chunk(2, -1)
        heads = HIDDEN // SUMMARY_HEAD_DIM
        k, v = (part.reshape(columns, rows, heads, -1).transpose(1, 2) for part in (k, v))
        q = self.q.reshape(QUERIES, heads, -1).transpose(0, 1)[None]
        scores = (q @ k.transpose(-1, -2)) * SUMMARY_HEAD_DIM**-0.5
        real = mask[:, 0][None, None, None]  # the original takes the first column's mask for all
        weights = scores.masked_fill(real == 0, -1e10).softmax(-1)
        return self.ff((weights @ v).transpose(1, 2).reshape(columns, QUERIES, -1))


class RowColTransformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        halves = lambda: [  # noqa: E731
            PreNorm(CELL, Residual(RowColAttention())),
            PreNorm(CELL, Residual(FeedForward(CELL))),
        ]
        self.layers = nn.ModuleList(nn.ModuleList([*halves(), *halves()]) for _ in range(depth))

    def forward(self, cells, mask):
        along_columns, along_rows = mask.T @ mask, mask @ mask.T
        for across, across_ff, down, down_ff in self.layers:
            cells = across_ff(across(cells, mask=along_columns))
            cells = down_ff(down(cells.transpose(0, 1), mask=along_rows)).transpose(0, 1)
        return cells


class SimpleMlp(nn.Module):
    """Of contrastive pretraining; nothing reads it afterwards."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CELL, CELL), nn.ReLU(), nn.Linear(CELL, 8))


class Encoder(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.st = BertModel(BertConfig(**{k: v for k, v in SENTENCE.items() if k != "model_type"}), False)
        self.transformer = RowColTransformer(depth)
        self.col_specific_projection_head = SimpleMlp()
        self.qformer = Qformer()

    def forward(self, ids, kept, rows, columns):
        """Encode one padded grid: ids and kept [ROWS, COLUMNS, tokens], of which rows × columns are real."""
        tokens = ids.shape[-1]
        states = self.st(ids.reshape(-1, tokens), attention_mask=kept.reshape(-1, tokens)).last_hidden_state
        weights = kept.reshape(-1, tokens, 1).float()
        vectors = functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)
        mask = torch.zeros(ROWS, COLUMNS)
        mask[:rows, :columns] = 1
        return self.qformer(self.transformer(vectors.reshape(ROWS, COLUMNS, -1), mask), mask)[:columns]


class Projector(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x):
        return self.model(x)


class CellTableGPT(nn.Module):
    """The variant of the paper: `decoder`, `encoder`, `projector`."""

    def __init__(self, depth=2):
        super().__init__()
        self.decoder = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in DECODER.items() if k != "model_type"}))
        self.encoder = Encoder(depth)
        self.projector = Projector()

    def positions(self, table):
        """What one table, as lists of token ids by row and column, is for the decoder: [columns · queries, hidden]."""
        rows, columns = len(table), len(table[0])
        ids = torch.ones(ROWS, COLUMNS, CELL_TOKENS, dtype=torch.long)  # padded with 1, mask and all, as the original
        kept = torch.ones_like(ids)
        for i, row in enumerate(table):
            for j, cell in enumerate(row):
                ids[i, j], kept[i, j] = 0, 0
                ids[i, j, : len(cell)], kept[i, j, : len(cell)] = torch.tensor(cell), 1
        return self.projector(self.encoder(ids, kept, rows, columns)).flatten(0, 1)

    def logits(self, prompt, tables):
        embedded = self.decoder.get_input_embeddings()(torch.tensor([prompt]).clamp(min=0))
        if tables:
            places = torch.tensor([prompt]) == PLACE
            embedded[places] = torch.cat([self.positions(table) for table in tables])
        return self.decoder(inputs_embeds=embedded).logits[0]


class CodeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        width = MARKUP["n_embd"]
        self.register_buffer("causal_mask", torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.uint8)))
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        length, width = x.shape
        heads, rotary, groups = MARKUP["n_head"], MARKUP["rotary_dim"], 4
        mixed = self.qkv_proj(x).reshape(length, groups, -1)
        q, v, k = (part.reshape(length, heads, -1) for part in mixed.split(width // groups, dim=-1))
        positions = torch.arange(length).float()
        for frequency in range(rotary // 2):
            angle = positions / 10000 ** (2 * frequency / rotary)
            a, b = 2 * frequency, 2 * frequency + 1
            for states in (q, k):
                first, second = states[..., a].clone(), states[..., b].clone()
                states[..., a] = first * angle.cos()[:, None] - second * angle.sin()[:, None]
                states[..., b] = second * angle.cos()[:, None] + first * angle.sin()[:, None]
        scores = torch.einsum("ihd,jhd->hij", q, k) / (width // heads) ** 0.5
        return self.out_proj(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(length, width))


class CodeMlp(nn.Module):
    def __init__(self):
        super().__init__()
        width = MARKUP["n_embd"]
        self.fc_in, self.fc_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc_out(functional.gelu(self.fc_in(x), approximate="tanh"))


class CodeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(MARKUP["n_embd"], eps=1e-5)
        self.attn, self.mlp = CodeAttention(), CodeMlp()

    def forward(self, x):
        normed = self.ln_1(x)
        return self.attn(normed) + self.mlp(normed) + x


class CodeEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(MARKUP["vocab_size"], MARKUP["n_embd"])
        self.h = nn.ModuleList(CodeBlock() for _ in range(MARKUP["n_layer"]))
        self.ln_f = nn.LayerNorm(MARKUP["n_embd"], eps=1e-5)

    def forward(self, ids):
        states = self.wte(ids)
        for block in self.h:
            states = block(states)
        return self.ln_f(states)


class MarkupTableGPT(nn.Module):
    """The variant that reads Markdown."""

    def __init__(self):
        super().__init__()
        self.decoder = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in DECODER.items() if k != "model_type"}))
        self.encoder = CodeEncoder()
        self.projector = nn.Sequential(nn.Linear(MARKUP["n_embd"], HIDDEN))

    def positions(self, ids):
        return self.projector(self.encoder(torch.tensor(ids)))

    def logits(self, prompt, tables):
        embedded = self.decoder.get_input_embeddings()(torch.tensor([prompt]).clamp(min=0))
        embedded[torch.tensor([prompt]) == PLACE] = torch.cat([self.positions(table) for table in tables])
        return self.decoder(inputs_embeds=embedded).logits[0]


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights away from every value that would hide a mistake: norms not 1, biases not 0, a head with margins."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or ".ln_" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                scale = 2.0 if name.startswith("projector") else 0.3  # what tables say must move the answer
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.decoder.lm_head.weight.mul_(4)
    return model.eval()


def cell_config(depth: int = 2) -> dict[str, Any]:
    """config.json of the variant of the paper; the summary's width is a value here that the original fixes at 3584."""
    return {
        "architectures": ["TableGPTContrastiveForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_tablegpt.TableGPTConfig"},
        "model_type": "tablegpt_contrastive",
        "torch_dtype": "float32",
        "llm_config": DECODER,
        "encoder_config": {
            "num_cols": 20,
            "depth": depth,
            "heads": HEADS,
            "dim_head": HEAD_DIM,
            "attentiontype": "colrow",
            "pooling": "mean",
            "max_rows": COLUMNS,  # swapped in the original: it samples max_cols rows and takes max_rows columns
            "max_cols": ROWS,
            "subfolder": "encoder",
            "encoder_max_length": CELL_TOKENS,
            "insert_embs_token": "<insert_embs>",
            "insert_embs_token_id": PLACE,
            "insert_seq_token": "<insert_sep>",
            "qformer_dim_head": SUMMARY_HEAD_DIM,
            "st_config": SENTENCE,
        },
        "projector_config": {
            "mlp_depth": 2,
            "encoder_hidden_size": HIDDEN,
            "decoder_hidden_size": HIDDEN,
            "num_heads": 1,
            "multihead": False,
        },
    }


def markup_config() -> dict[str, Any]:
    """config.json of the variant that reads Markdown."""
    encoder = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "model_type": "codet5p_module", **MARKUP}
    return {
        "architectures": ["TableGPTMarkupForCausalLM"],
        "model_type": "tablegpt_markup",
        "torch_dtype": "float32",
        "mlp_depth": 1,
        "encoder_max_length": 48,
        "placeholder_token": "<TABLE_CONTENT>",
        "placeholder_token_id": PLACE,
        "encoder_hidden_size": MARKUP["n_embd"],
        "decoder_hidden_size": HIDDEN,
        "llm_config": DECODER,
        "encoder_config": {**encoder, "subfolder": "encoder"},
    }


def make_cell_tokenizer(folder: Path) -> Tokenizer:
    """A word-piece tokenizer of 128 tokens, as BERT's, saved as `tokenizer.json`."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters]
    words += [f"##{letter}" for letter in "0123456789.abcdefghilnorstu" if f"##{letter}" not in words]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words[:128])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.enable_truncation(5)  # whatever a file says of its own: the configuration's length counts
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_original(folder: Path, model: nn.Module, config: dict[str, Any], layout: str) -> Path:
    """Write a folder as published: `layout` is safetensors, bin (one pickle) or parts (three pickles)."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    make_cell_tokenizer(folder / "encoder")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.2}))
    (folder / "modeling_tablegpt.py").write_text("raise SystemExit('never run')\n")
    state = model.state_dict()
    if layout == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        for part in ("decoder", "encoder", "projector"):
            torch.save(getattr(model, part).state_dict(), folder / f"{part}.bin")
    return folder


def table_ids(rows: int, columns: int, seed: int = 0, longest: int = CELL_TOKENS) -> list[list[list[int]]]:
    """A random table as token ids by row and column, of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size=(): torch.randint(low, high, size, generator=generator).tolist()  # noqa: E731
    return [[draw(2, 128, (draw(1, longest + 1),)) for _ in range(columns)] for _ in range(rows)]


PROMPT_TEXT = PROSE[:60]
