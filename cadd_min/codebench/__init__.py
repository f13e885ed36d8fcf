"""HumanEval and MBPP: problems, programs, and a sandbox that runs them."""
