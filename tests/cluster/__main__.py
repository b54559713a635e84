from cluster import programs
print(programs.ensure())
