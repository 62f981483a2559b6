"""Everything that can be known before compute: checkpoints' headers, family tables, plans. No torch."""
