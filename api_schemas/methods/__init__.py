"""The union of all method settings: one line a method, discriminated by `method`."""

from api_schemas.methods.modegpt import ModegptConfig

MethodConfig = ModegptConfig

__all__ = ["MethodConfig", "ModegptConfig"]
