"""Memories for other programs, one file for each target; `gradmem.exports.targets` names them all."""
