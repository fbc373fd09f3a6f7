"use strict";
const bar = document.getElementById("bar"), list = document.getElementById("groups");
const count = document.getElementById("count"), none = document.getElementById("none"), note = count.textContent;
const groups = [...list.querySelectorAll("section.group")];

function number(text, otherwise) {
  return text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text);
}

// What a group is ordered by; one without rewards comes last.
function rank(data, order) {
  const reward = data.reward === "" ? null : Number(data.reward);
  if (order === "middle") return reward === null ? Infinity : Math.abs(reward - 0.5);
  if (order === "reward") return reward === null ? Infinity : reward;
  if (order === "-reward") return reward === null ? Infinity : -reward;
  return order.startsWith("-") ? -Number(data[order.slice(1)]) : Number(data[order]);
}

function matches(group, want) {
  const data = group.dataset, reward = number(data.reward, null);
  for (const name of ["domain", "kind", "chosen"]) if (want[name] !== "" && data[name] !== want[name]) return false;
  if (data.step < number(want.first, -Infinity) || data.step > number(want.last, Infinity)) return false;
  if (want.low !== "" && !(reward !== null && reward >= number(want.low, -Infinity))) return false;
  if (want.high !== "" && !(reward !== null && reward <= number(want.high, Infinity))) return false;
  return !want.text || group.textContent.toLowerCase().includes(want.text.toLowerCase());
}

function apply() {
  const want = Object.fromEntries(new FormData(bar));
  let left = 0;
  for (const group of groups) {
    group.hidden = !matches(group, want);
    left += !group.hidden;
  }
  const ranks = new Map(groups.map((group) => [group, rank(group.dataset, want.order)]));
  const ordered = [...groups].sort((a, b) => ranks.get(a) - ranks.get(b) || a.dataset.number - b.dataset.number);
  if (ordered.some((group, place) => list.children[place] !== group)) list.append(...ordered);
  count.textContent = left === groups.length ? note : `${left} of ${groups.length} shown`;
  none.hidden = left > 0;
}

bar.addEventListener("input", apply);
bar.addEventListener("submit", (event) => event.preventDefault());
apply();
