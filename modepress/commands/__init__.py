"""The commands, by what they are about; `modepress.cli` puts them together."""
