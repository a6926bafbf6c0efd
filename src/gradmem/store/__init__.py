"""Memories people keep: names, tags, versions, one database for all.

>>> from gradmem.store import Store
>>> with Store() as store:
...     entry = store.write(gradmem.load("kv-32"), "a7:Qz", name="notes")
...     store.open("notes").ask("a7")
'Qz'
"""

from .entries import Diff, Entry, Version
from .store import Store, content_of

__all__ = ["Diff", "Entry", "Store", "Version", "content_of"]
