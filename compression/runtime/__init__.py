"""Module classes that compressed models need to run. Importing this registers them with transformers' Auto classes."""

from compression.runtime.models import register

register()
