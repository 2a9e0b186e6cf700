function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}
for (const button of document.querySelectorAll('.sortable th button')) {
  button.addEventListener('click', () => {
    const head = button.parentElement, column = head.cellIndex, body = head.closest('table').tBodies[0];
    const order = head.ariaSort === 'ascending' ? 'descending' : 'ascending';
    for (const other of head.parentElement.cells) if (other.ariaSort) other.ariaSort = 'none';
    head.ariaSort = order;
    const rows = [...body.rows].sort((a, b) =>
      String(valueOf(a, column)).localeCompare(String(valueOf(b, column)), undefined, { numeric: true }));
    body.append(...(order === 'ascending' ? rows : rows.reverse()));
  });
}
