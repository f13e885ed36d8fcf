"""The figures of docs/, each drawn by one function from stored numbers or from a closed form.

style      one look for all figures, readable on a light and on a dark page
tables     read the Markdown tables of docs/, so that a figure and its table cannot disagree
process    the forward and the reverse process on a sentence and a digit
curves     the clocks, the leak, the dial, and what was measured
record     run two trained models once and store what the process figures show
"""
