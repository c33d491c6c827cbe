/* A model's text as elements: code blocks, headings, lists, quotes, bold, italics, code. Built node by node, so what
   looks like HTML, or like anything not named here, stays the text that it is. */
"use strict";
import { make } from "./session.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.+?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![*\w])\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?![*\w])/s;

/* Text -> [{kind, lines, ...}]; a code block that has not ended yet is one. */
export function blocks(text) {
  const found = [];
  let open = null;
  const begin = (block) => found.push((open = block));
  for (const line of text.split("\n")) {
    if (open && open.kind === "code" && !open.closed) {
      const fence = line.match(/^ {0,3}(```+|~~~+)\s*$/);
      if (fence && fence[1].startsWith(open.fence)) open.closed = true;
      else open.lines.push(line);
      continue;
    }
    let match;
    if ((match = line.match(FENCE))) begin({ kind: "code", fence: match[1], language: match[2], lines: [], closed: false });
    else if (!line.trim()) open = open && open.kind === "list" ? open : null;
    else if ((match = line.match(HEADING))) begin({ kind: "heading", level: match[1].length, lines: [match[2]] }), open = null;
    else if (ITEM.test(line)) (open && open.kind === "list" ? open : begin({ kind: "list", lines: [] }), open.lines.push(line));
    else if (open && open.kind === "list" && /^\s+\S/.test(line)) open.lines.push(line);
    else if (/^\s*>\s?/.test(line)) {
      if (!open || open.kind !== "quote") begin({ kind: "quote", lines: [] });
      open.lines.push(line.replace(/^\s*>\s?/, ""));
    } else if (open && open.kind === "text") open.lines.push(line);
    else begin({ kind: "text", lines: [line] });
  }
  return found;
}

function inline(into, text) {
  let match;
  while ((match = text.match(INLINE))) {
    into.append(text.slice(0, match.index));
    if (match[2] !== undefined) into.append(make("code", { text: match[2] }));
    else into.append(inline(make(match[3] !== undefined ? "strong" : "em"), match[3] ?? match[4]));
    text = text.slice(match.index + match[0].length);
  }
  into.append(text);
  return into;
}

/* Deeper items go into a list of their own; a line that is no item belongs to the one before. */
function list(lines) {
  const stack = [];
  let item = null;
  for (const line of lines) {
    const match = line.match(ITEM);
    if (!match) {
      if (item) inline(item, "\n" + line.trim());
      continue;
    }
    const indent = match[1].replaceAll("\t", "    ").length;
    while (stack.length > 1 && indent < stack.at(-1).indent) stack.pop();
    if (!stack.length || indent > stack.at(-1).indent + 1) {
      const number = parseInt(match[2], 10);
      const made = make(Number.isNaN(number) ? "ul" : "ol", number > 1 ? { start: number } : {});
      if (item) item.append(made);
      stack.push({ indent, made });
    }
    item = inline(make("li"), match[3]);
    stack.at(-1).made.append(item);
  }
  return stack[0].made;
}

function build(block) {
  const text = block.lines.join("\n");
  if (block.kind === "code") {
    const head = make("div", { className: "code-head" }, make("span", { text: block.language || "code" }));
    if (block.closed) head.append(make("button", { text: "Copy", type: "button", className: "quiet copy-code" }));
    return make("figure", { className: "code" }, head, make("pre", { tabindex: "0" }, make("code", { text })));
  }
  if (block.kind === "heading") return inline(make(block.level < 3 ? "h3" : "h4"), text);
  if (block.kind === "list") return list(block.lines);
  return inline(make(block.kind === "quote" ? "blockquote" : "p"), text);
}

const shown = new WeakMap(); // element -> what it was built from

/* Make `into` show `text`, touching only what has changed: answers grow at their end. */
export function render(into, text) {
  const wanted = blocks(text);
  for (const [i, block] of wanted.entries()) {
    const source = JSON.stringify(block);
    const there = into.children[i];
    if (there && shown.get(there) === source) continue;
    const made = build(block);
    shown.set(made, source);
    if (there) there.replaceWith(made);
    else into.append(made);
  }
  while (into.children.length > wanted.length) into.lastElementChild.remove();
}
