"""One function per stage of the pipeline, each from a recipe and a folder to files: what the commands call.

prepare -> store    train -> run    paint -> pictures    evaluate -> card    report -> page
"""
