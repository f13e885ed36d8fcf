"""HumanEval and MBPP: what a model writes, and whether the tests pass.

problems        the problems, their prompts, tests and reference solutions
evalplus        the problems with EvalPlus's larger tests
scores          from an answer to a program, and from counts to pass@k
journal         a file of finished pieces, from which a later run goes on
sandbox         runs programs of unknown content, one by one
sandbox_walls   the process that builds a sandbox's walls
sandbox_inside  the process inside, which runs the program and its tests
evaluate        evaluate.py code: generate, extract, execute
"""
