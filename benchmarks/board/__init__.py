"""Other programs on the board of `gradmem board`: the same texts and questions, equal bytes, rows of the same form.

1. `gradmem board MODEL --data FILE --json BOARD.json --answers ANSWERS.json`
2. `python -m benchmarks.board.export MODEL DIRECTORY`: the language model alone, as kvpress loads it.
3. `python -m benchmarks.board.kvpress_rows DIRECTORY ANSWERS.json --json KVPRESS.json`: presses of kvpress, in an
   environment of its own: `pip install kvpress torchmetrics platformdirs` (kvpress wants transformers below 5.3), and
   `PYTHONPATH=src`, since of this package it needs only what scores answers.
4. `python -m benchmarks.board.cartridge_rows MODEL ANSWERS.json --json CARTRIDGE.json`: PEFT's CARTRIDGE.
5. `python -m benchmarks.board.figure BOARD.json KVPRESS.json CARTRIDGE.json -o board.png`

All times are comparable only if everything runs on the same machine with the same number of threads.
"""
