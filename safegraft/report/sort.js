// Makes the columns of every table.sortable sort on a click. The page is complete without it.
(() => {
  const key = (cell) => {
    const text = cell.textContent.trim();
    const value = parseFloat(text.replace("\u2212", "-").replace(/^[<>\s]+/, "").replace(/,/g, ""));
    return { text, value };
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const numeric = head.classList.contains("num");
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sorted = head.getAttribute("aria-sort");
        const up = sorted ? sorted === "descending" : !numeric;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => ({ row, ...key(row.cells[column]) }));
        rows.sort((a, b) => {
          if (numeric) {
            if (Number.isNaN(a.value) || Number.isNaN(b.value)) return Number.isNaN(a.value) - Number.isNaN(b.value);
            return up ? a.value - b.value : b.value - a.value;
          }
          return (up ? 1 : -1) * a.text.localeCompare(b.text, "en", { numeric: true });
        });
        body.append(...rows.map(({ row }) => row));
      });
    });
  }
})();
