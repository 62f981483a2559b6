"""The keys of a GGUF file that say what model it holds."""

from gguf import GGUFWriter

from compression.exporters.source import ExportSource


def file_keys(writer: GGUFWriter, source: ExportSource) -> None:
    """Add the sizes of the model, under its architecture's name.

    Head sizes are always written, also where they are hidden size / heads: readers that derive them would be wrong for
    reduced attention. Architecture `deci` has one entry per block where the others have one number.
    """
    size, config = source.size, source.config
    per_block = source.architecture.name == "deci"
    writer.add_name(str(source.model.folder.name))
    writer.add_vocab_size(size.vocabulary)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.blocks)
    writer.add_feed_forward_length(list(source.widths) if per_block else source.widths[0])
    writer.add_head_count([size.heads] * size.blocks if per_block else size.heads)
    writer.add_head_count_kv([size.kv_heads] * size.blocks if per_block else size.kv_heads)
    writer.add_key_length(size.head_dim)
    writer.add_value_length(size.head_dim)
    writer.add_rope_dimension_count(size.head_dim)
    writer.add_rope_freq_base(source.theta)
    writer.add_layer_norm_rms_eps(float(source.model.config.rms_norm_eps))
