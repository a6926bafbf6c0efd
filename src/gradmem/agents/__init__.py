"""Agents: tools for programs that act by themselves, and the MCP server that offers them."""
