"""A plot as a file of its own."""

import re
from xml.etree import ElementTree

from vitrail.report import plots


def test_a_plot_stands_alone_in_light_and_in_dark():
    svg = plots.standalone(plots.class_counts_plot({"a": 3, "b": 1}))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox")
    style = next(element.text for element in root.iter() if element.tag.endswith("style"))
    assert style.count(":root{") == 2
    assert style.count("prefers-color-scheme:dark") == 1
    assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", style))
