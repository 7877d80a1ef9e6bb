"""Other systems' own ways to start vLLM: each module needs what it is named after."""
