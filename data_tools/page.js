"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

function unpack(text) {
  const bytes = atob(text), ids = [];
  for (let at = 0; at < bytes.length; at += 3)
    ids.push(bytes.charCodeAt(at) | (bytes.charCodeAt(at + 1) << 8) | (bytes.charCodeAt(at + 2) << 16));
  return ids;
}

// Text advances all axes by one; a frame holds time, counts rows and columns, then advances all by its longer side.
function* walk(doc) {
  let cursor = 0, index = 0, frame = 0, run = 0, left = doc.weights.length ? doc.weights[0][0] : 0;
  for (const id of unpack(doc.ids)) {
    const visual = id === page.image, [rows, columns] = visual ? doc.frames[frame++] : [1, 1];
    const count = rows * columns;
    while (left <= 0 && run + 1 < doc.weights.length) left += doc.weights[++run][0];
    yield { id, index, visual, rows, columns, count, cursor, weight: doc.weights[run][1] };
    left -= count;
    index += count;
    cursor += visual ? Math.max(rows, columns) : 1;
  }
}

function show(element) {
  if (element.childElementCount) return;
  const doc = page.documents[element.dataset.doc], parts = document.createDocumentFragment();
  for (const token of walk(doc)) {
    const span = document.createElement("span");
    span.token = token;
    if (token.visual) {
      span.className = "v";
      span.textContent = `▦ ${token.rows} × ${token.columns} = ${token.count}`;
    } else {
      span.textContent = page.texts[token.id].replaceAll("\n", "⏎\n");
      if (token.weight > 0) span.style.background = `rgba(var(--trained), ${Math.min(0.45, 0.12 + 0.2 * token.weight)})`;
      else span.className = "m";
    }
    parts.append(span);
  }
  element.append(parts);
}

function describe(token) {
  const far = token.cursor, axes = token.visual
    ? `time ${far}\nrow ${far} to ${far + token.rows - 1}\ncolumn ${far} to ${far + token.columns - 1}`
    : `time ${far}  row ${far}  column ${far}`;
  const place = token.visual ? `tokens ${token.index} to ${token.index + token.count - 1}` : `token ${token.index}`;
  return `${place}   id ${token.id}\n${JSON.stringify(page.texts[token.id])}\nloss weight ${token.weight}\n${axes}`;
}

for (const details of document.querySelectorAll("details.doc")) {
  const tokens = details.querySelector(".tokens");
  if (details.open) show(tokens);
  details.addEventListener("toggle", () => details.open && show(tokens));
}
document.addEventListener("mousemove", (event) => {
  const token = event.target.token;
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  tip.textContent = describe(token);
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (event.clientY + 20 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 20) + "px";
});
function follow() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.matches("details")) target.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", follow);
follow();
