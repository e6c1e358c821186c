"""Simulation of eviction policies: recorded requests, replayed against a prefix cache of blocks.

``trace``   reads recorded requests
``replay``  counts the blocks a policy finds, and those the best of all could
``report``  compares policies over capacities, as a table, a file and a figure
"""
