"""Module classes that compressed models need to run. Importing this registers them with transformers' Auto classes."""

from compression.runtime import composites, models

models.register()
composites.register()
