"""What an artefact is and whether it will work, from its headers and side files alone.

Rule: nothing is loaded and nothing is run; what is not of a known family gets a name and no opinion.
"""
