"""Module classes that compressed models need to run. Importing this registers them with transformers' Auto classes."""

from compression.runtime import artgpt4, composites, minigpt4, mixed_codes, models, mplug2, tablegpt2, tinygptv

models.register()
for _family in (minigpt4, tinygptv, artgpt4, mplug2, tablegpt2):
    _family.register()
composites.register()
mixed_codes.register()
