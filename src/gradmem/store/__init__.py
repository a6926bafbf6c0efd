"""A store of memories: names, tags and versions, in one database.

>>> from gradmem.store import Store
>>> with Store() as store:
...     entry = store.write(gradmem.load("kv-32"), "a7:Qz", name="notes")
...     store.open("notes").ask("a7")
'Qz'
"""

from .content import content_hash
from .entries import Diff, Entry, Version
from .store import Store

__all__ = ["Diff", "Entry", "Store", "Version", "content_hash"]
