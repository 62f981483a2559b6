"""Module classes that compressed models need to run. Importing this registers them with transformers' Auto classes."""

from compression.runtime import composites, models, tablegpt2

models.register()
composites.register()
tablegpt2.register()
