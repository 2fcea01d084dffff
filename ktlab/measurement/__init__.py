"""Quality, speed and the machine: numbers that come with their error bar and their ceiling.

`quality` and `speed` measure, `compare` and `sweep` put the two together, `roofline` and
`hardware` say what the machine allows, `doctor` what is missing. Nothing is imported here, so
that `doctor` works where torch does not.
"""
