"""What a page is made of, as a reader of HTML sees it."""

import html.parser
import json

VOID = {"meta", "input"}


class Page(html.parser.HTMLParser):
    """Elements in order, each `(name, attributes, nonce)`, and texts by id or name."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, "not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), "an attribute twice"
        nonce = attributes.pop("nonce", None)
        self.elements.append((tag, attributes, nonce))
        if tag not in VOID:
            self.open.append((tag, attributes.get("id", tag)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, "nested badly"

    def handle_data(self, data):
        if self.open:
            name = self.open[-1][1]
            self.texts[name] = self.texts.get(name, "") + data

    @property
    def data(self) -> dict:
        return json.loads(self.texts["data"])

    @property
    def skeleton(self) -> list:
        """Elements and their attributes; those that hold the nonce or a policy with it, without."""
        return [
            (tag, {k: v for k, v in attributes.items() if "nonce" not in (v or "")})
            for tag, attributes, _ in self.elements
        ]
