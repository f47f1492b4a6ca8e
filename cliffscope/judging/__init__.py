"""Judging: does an answer refuse or comply, or is there none?"""
