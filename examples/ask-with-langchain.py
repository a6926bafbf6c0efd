"""Ask a memory of `gradmem serve` with LangChain, which needs no more than the address of the server.

pip install langchain-openai
gradmem serve &
python ask-with-langchain.py http://127.0.0.1:8000 kv-32:notes a7 k2
"""

from __future__ import annotations

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main(url: str, model: str, *questions: str) -> None:
    """Ask a memory each question, in one batch, and stream the last answer once more."""
    memory = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", use_responses_api=False)
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | memory | StrOutputParser()
    asked = [{"question": question} for question in questions]
    for question, answer in zip(questions, chain.batch(asked), strict=True):
        print(f"{question} -> {answer}")
    print("".join(chain.stream(asked[-1])))


if __name__ == "__main__":
    main(*sys.argv[1:])
