for (const list of document.querySelectorAll(".answers")) {
  const filters = list.querySelector(".filters"), cards = [...list.querySelectorAll(".answer")];
  const value = name => filters.elements[name] ? filters.elements[name].value : "";
  const checked = name => filters.elements[name] && filters.elements[name].checked;
  const texts = cards.map(card => card.textContent.toLowerCase());
  const fits = (card, i) =>
    (!value("group") || card.dataset.group === value("group")) &&
    (!value("verdict") || card.dataset.verdict.split(" ").includes(value("verdict"))) &&
    (!checked("changed") || card.dataset.changed) &&
    (!checked("disagree") || card.dataset.disagree) &&
    texts[i].includes(value("words").trim().toLowerCase());
  const update = () => {
    let n = 0;
    cards.forEach((card, i) => { card.hidden = !fits(card, i); n += !card.hidden; });
    for (const side of list.querySelectorAll("[data-side]"))
      side.hidden = filters.querySelector(`[name="side-${side.dataset.side}"]:not(:checked)`) !== null;
    filters.querySelector("output").textContent = `${n} of ${cards.length}`;
  };
  filters.hidden = false;
  filters.addEventListener("input", update);
  filters.addEventListener("submit", event => event.preventDefault());
  const open = () => {
    const side = location.hash.match(/^#side-(.+)$/);
    if (!side || !filters.elements[`side-${side[1]}`]) return;
    for (const box of filters.querySelectorAll('[name^="side-"]'))
      box.checked = ["before", side[1]].includes(box.name.slice(5));
    update();
    list.scrollIntoView();
  };
  addEventListener("hashchange", open);
  update();
  open();
}
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((head, column) => {
    head.style.cursor = "pointer";
    head.title = "sort";
    head.addEventListener("click", () => {
      const key = row => { const text = row.cells[column].textContent, n = parseFloat(text.replace("−", "-")); return isNaN(n) ? text : n; };
      const rows = [...table.tBodies[0].rows], up = head.dataset.up = head.dataset.up === "1" ? "" : "1";
      rows.sort((a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (up ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
