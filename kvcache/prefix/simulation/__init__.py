"""Simulation of eviction policies: recorded requests, replayed against a prefix cache of blocks.

``trace``   reads recorded requests
``replay``  counts the blocks a policy finds, and those the best of all could
``ceiling`` the same with hazards known beforehand: what the classes of `gittins` can tell
``hints``   says which prompts return, to be retained; wrongly at times
``report``  compares policies over capacities, as a table, a file and a figure
"""
