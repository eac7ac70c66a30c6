// Small helpers over the DOM. Text goes in as text nodes only: nothing of a model or a tool is ever markup.

type Child = Node | string | undefined | false;

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  for (const child of children) if (child) node.append(child);
  return node;
}

export function byId<T extends HTMLElement>(id: string): T {
  const node = document.getElementById(id);
  if (!node) throw new Error(`the page has no #${id}`);
  return node as T;
}

/** Makes `parent` hold exactly these nodes, moving only what is out of place, so that focus and selection stay. */
export function place(parent: Element, nodes: Element[]): void {
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
  });
  while (parent.children.length > nodes.length) parent.lastElementChild?.remove();
}

/** Sets a text only where it changed. Growth is appended, which keeps a reader's selection. */
export function setText(node: Element, text: string): void {
  const first = node.firstChild;
  if (first instanceof Text && node.childNodes.length === 1) {
    if (first.data === text) return;
    if (first.data.length > 0 && text.startsWith(first.data)) first.appendData(text.slice(first.data.length));
    else first.data = text;
  } else {
    node.textContent = text;
  }
}

export function hide(node: HTMLElement, hidden: boolean): void {
  if (node.hidden !== hidden) node.hidden = hidden;
}
