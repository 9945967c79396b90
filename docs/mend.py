"""Pages that libraries wrote, as the standard for HTML wants them."""
import re

STYLE = re.compile(r"<style(?P<attributes>[^>]*)>.*?</style>", re.DOTALL)
PRE = re.compile(r"<pre>.*?</pre>", re.DOTALL)


def valid_html(
    html: str,  # a page, as the libraries made it
) -> str:
    "The page as the standard wants it: styles stand in the head (pandas' scoped ones nowhere, since the site has its own), lines of code are no blocks, an empty corner of a table is no header, and no attribute is HTML 4's."
    head, end, body = html.partition("</head>")
    styles = dict.fromkeys(found[0] for found in STYLE.finditer(body) if "scoped" not in found["attributes"])
    body = PRE.sub(lambda found: re.sub(r"(</?)div\b", r"\1span", found[0]), STYLE.sub("", body))
    body = re.sub(r'<th (class="blank[^"]*")\s*>&nbsp;</th>', r"<td \1></td>", body)
    return head + "".join(styles) + end + re.sub(r' halign="\w+"', "", body)
